"""Common slips, other programs' words above all: the error says at once what to type here."""

import pytest

from fitune.config.run import resolve
from fitune.errors import UsageError

SLIPS = {
    "learning_rate=1e-4": "did you mean 'training.learning_rate'?",
    "LEARNING_RATE=1e-4": "did you mean 'training.learning_rate'?",
    "training.learning-rate=1e-4": "did you mean 'training.learning_rate'?",
    "training.learning_rate": "expected key=value, for example --set training.learning_rate=1e-4",
    "training.learning_rate=": "training.learning_rate has no value; give one, or null to take away what a recipe has",
    "training.learning_rate=2e-4x": "training.learning_rate: '2e-4x' is not a number",
    "training.learning_rate=1,5": "training.learning_rate: '1,5' is not a number",
    "lr=1e-4": "did you mean 'training.learning_rate'?",
    "epochs=3": "did you mean 'training.num_train_epochs'?",
    "training.epochs=3": "did you mean 'training.num_train_epochs'?",
    "warmup_ratio=0.1": "set training.warmup_steps to a share of all steps, below 1",
    "training.max_step=3": "did you mean 'training.max_steps'?",
    "training.lerning_rate=3": "did you mean 'training.learning_rate'?",
    "training.qwertz=3": "training.qwertz is not a field of TRL's SFTConfig",
    "training.evaluation_strategy=steps": "did you mean 'training.eval_strategy'?",
    "training.eval_strategy=step": "did you mean 'steps'?",
    "training.optim=adamw": "did you mean 'adamw_torch'?",
    "training.optim=adam": "allowed: adagrad, adamw_torch, adamw_torch_fused, rmsprop, sgd",
    "training.lr_scheduler_type=cosin": "did you mean 'cosine'?",
    "training.report_to=tensorboard,wandb": "a list needs brackets: [tensorboard, wandb]",
    "batch_size=8": "did you mean 'global_batch_size'?",
    "per_device_train_batch_size=2": "set micro_batch in the memory profile",
    "micro_batch_size=2": "did you mean 'profile.micro_batch'?",
    "gradient_accumulation_steps=2": "it follows from global_batch_size, micro_batch and the number of processes",
    "gradient_checkpointing=true": "set kept_layers in the memory profile",
    "max_seq_length=512": "did you mean 'max_length'?",
    "cutoff_len=512": "did you mean 'max_length'?",
    "model=some/model": "did you mean 'base.model'?",
    "base=some/model": "base is a block of keys, not 'some/model'; set one of base.model, base.revision",
    "dataset=some/rows": "did you mean 'data.dataset'?",
    "system_prompt=Be brief.": "did you mean 'data.system_message'?",
    "lora.rank=8": "did you mean 'lora.r'?",
    "rank=8": "did you mean 'lora.r'?",
    "lora=8": "lora is a block of keys, not 8; set one of lora.r, lora.alpha, lora.dropout, lora.target_modules, "
    "lora.trainable_tokens",
    "lora.target_modules=q_proj,v_proj": "a list needs brackets: [q_proj, v_proj]",
    "lora.target_modules=all": "did you mean 'all-linear'?",
    "data.chat_template=llama-3": "data.chat_template: allowed are llama3, chatml, plain, tokenizer or the path of a "
    ".jinja file, not 'llama-3'",
    "lora.target_modules=q_proj": "a list needs brackets: [q_proj]",
    "method=QLoRA": "did you mean 'qlora'?",
    "load_in_4bit=true": "set method=qlora",
    "bf16=true": "set mixed_precision in the accelerate config",
    "fp8=true": "did you mean 'profile.compute'?",
    "kept_layers=3": "did you mean 'profile.kept_layers'?",
    "profile.kept_attention=maybe": "kept_attention: Input should be a valid boolean or auto, not 'maybe'",
    "profile.kept_layers=all": "kept_layers: Input should be a valid integer or auto, not 'all'",
    "early_stopping_patience=2": "did you mean 'early_stopping.patience'?",
    "trust_remote_code=true": "it cannot be set: code from a model repository is never run",
    "resume=true": "use --resume",
    "output_dir=runs/x": "use --output",
    "wandb=true": "set training.report_to=wandb",
}


@pytest.mark.parametrize("typed", SLIPS)
def test_a_slip_gets_the_right_hint(typed):
    with pytest.raises(UsageError) as caught:
        resolve("tiny_qlora", "cpu_2proc", (typed,))
    assert str(caught.value).endswith(SLIPS[typed]), caught.value
