"""The folder that `generate` and `eval` were given when it is no run: a model's, or an adapter's with its base.

Nothing heavy is imported before it is needed: where other processes hold the model, the command itself is light.
"""

from dataclasses import dataclass
from pathlib import Path

from fitune.config.adapter_folder import is_adapter, named_base
from fitune.config.base_model import check_sizes
from fitune.config.hub import local_folder
from fitune.config.json_file import read_json
from fitune.config.schema import ADAPTER, Run
from fitune.data.file_formats import first_line
from fitune.errors import UsageError


@dataclass(frozen=True)
class GivenModel:
    """`folder` says how it is asked, `base` holds the weights: the same folder, but for an adapter."""

    folder: Path
    base: Path

    @property
    def is_adapter(self) -> bool:
        return self.folder != self.base

    @property
    def trains_biases(self) -> bool:
        """Of the base: PEFT, which asks such an adapter, does not take them away where it switches the adapter off."""
        from fitune.export.adapter import AdapterFile, read_adapter

        if not self.is_adapter:
            return False
        with AdapterFile(self.folder) as file:
            return (file.config.get("bias") or "none") != "none" and bool(read_adapter(file).biases)

    @property
    def system_message(self) -> str | None:
        """That the model was trained with, where that is known."""
        from fitune.export.chat_record import read_chat_record

        record = read_chat_record(self.folder)
        return record.system_message if record else None

    def check_chat_template(self, instead: str) -> None:
        """Raises UsageError where there is none, as in most base models. Reads small files alone."""
        from fitune.export.tokenizer_files import template_of

        if not (template_of(self.folder) or template_of(self._folder_of_texts())):
            raise UsageError(f"{self.folder}: has no chat template, as base models have none; {instead}")

    def check_can_be_asked(self, instead: str) -> None:
        """Raises UsageError for a chat template that is missing, or that cannot write a question, with the system
        message that the model was trained with."""
        import jinja2

        self.check_chat_template(instead)
        before = [{"role": "system", "content": self.system_message}] if self.system_message else []
        try:
            self.tokenizer().apply_chat_template(
                [*before, {"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            why = f"its chat template cannot write a question: {first_line(error)}"
            raise UsageError(f"{self.folder}: {why}; mend it, or {instead}") from None

    def tokenizer(self):
        """The folder's own. PEFT alone saves none beside an adapter: then it is the base's, as is the chat template."""
        from fitune.data.chat_template import read_tokenizer
        from fitune.export.tokenizer_files import template_of

        tokenizer = read_tokenizer(self._folder_of_texts())
        tokenizer.chat_template = template_of(self.folder) or tokenizer.chat_template
        return tokenizer

    def generation_config(self):
        """transformers' GenerationConfig: which tokens end an answer, and how one is drawn."""
        from transformers import AutoConfig, GenerationConfig

        from fitune.export.configs import GENERATION_CONFIG
        from fitune.export.model_folder import generation_of_adapter

        if self.is_adapter:
            return GenerationConfig(**generation_of_adapter(self.base, self.folder, self._folder_of_texts()))
        file = self.folder / GENERATION_CONFIG
        if file.exists():
            return GenerationConfig.from_dict(read_json(file, "remove it or write it again"))
        # its config.json says what transformers would take
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(self.folder, trust_remote_code=False))

    def _folder_of_texts(self) -> Path:
        from fitune.export.tokenizer_files import has_tokenizer

        return self.folder if has_tokenizer(self.folder) else self.base


def given_model(folder: Path, *, force: bool = False) -> GivenModel:
    """Finds, and downloads, an adapter's base. UsageError for a base that is not the adapter's, unless `force`."""
    if not is_adapter(folder):
        from fitune.export.configs import generation_config

        check_sizes(read_json(folder / "config.json", "give a model's folder"), folder / "config.json")
        generation_config(folder)  # both are refused where they are damaged
        return GivenModel(folder, folder)
    base = local_folder(*named_base(folder, "merge it with --base MODEL and give that folder"))
    from fitune.training.tuned import refuse_another_base

    refuse_another_base(folder, base, force)
    _refuse_other_shapes(folder, base)
    return GivenModel(folder, base)


def model_of(run: Run) -> GivenModel:
    """That for which `model_run.run_to_ask` wrote `run`."""
    base, adapter = Path(run.recipe.base.model), run.folder / ADAPTER
    return GivenModel(adapter.resolve() if adapter.exists() else base, base)


def _refuse_other_shapes(adapter: Path, base: Path) -> None:
    """UsageError for an adapter whose tensors do not fit the base. What `merge` cannot read is left to PEFT."""
    from fitune.export.adapter import AdapterFile, read_adapter
    from fitune.export.tuned_weights import TunedWeights
    from fitune.weights.base_weights import BaseWeights, read_base_config
    from fitune.weights.safetensors_files import Checkpoint

    with Checkpoint(base) as checkpoint, AdapterFile(adapter) as file:
        try:
            lora = read_adapter(file)
        except UsageError:
            return
        TunedWeights(BaseWeights(checkpoint), lora, file, tied=bool(read_base_config(base).get("tie_word_embeddings")))
