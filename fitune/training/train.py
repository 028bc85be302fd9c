"""One training run, top to bottom: `accelerate launch --config_file X.yaml -m fitune.training.train run.yaml`.

torchrun works in the same way, and so does plain python for a single process.
"""

import argparse
import gc
import os
import re
import sys
import traceback
import warnings
from functools import partial
from logging import LogRecord, getLogger
from pathlib import Path

import torch
from torch.distributed import DistNetworkError
from transformers import PrinterCallback
from transformers.utils import logging

from fitune import progress
from fitune.config import run as runs
from fitune.config.evaluation import stops_early
from fitune.config.hub import local_folder
from fitune.config.model_shapes import find_shape
from fitune.config.schema import Run
from fitune.data.dataset import TokenisedRows, load_tokenizer
from fitune.data.prepared import check_prepared, folder_with_tokens, map_rows, rows_beyond
from fitune.environment import let_segments_grow
from fitune.errors import CRASHED, INTERRUPTED, FituneError, UsageError, is_out_of_memory, say_while_training
from fitune.launching.heartbeat import Heartbeat
from fitune.launching.run_folder import accept_settings, begin_to_train, finish, refuse_to_begin_again
from fitune.launching.run_lock import RunLock, is_held_by_launcher
from fitune.model.activations import keep_activations
from fitune.model.compute_capability import compute_capability
from fitune.model.sharding import kept_in_host_ram, ranks_of_a_copy, shard, share_of, trained_dtype
from fitune.model.skeleton import build_skeleton, decoder
from fitune.planning.compute import FP8_CAPABILITY
from fitune.planning.memory import gpu_peak
from fitune.planning.plan import setup_to_train
from fitune.planning.sizes import GIB, Setup
from fitune.report.origin import write_origin
from fitune.training.arguments import training_arguments
from fitune.training.distributed import (
    as_rank,
    close_process_group,
    compute_device,
    end_with_launcher,
    from_rank_0,
    is_first_to_fail,
    is_main_process,
    join,
    wait_for_all,
    wait_for_rank_0,
)
from fitune.training.interruption import Interruption
from fitune.training.manifest import Identity, identify
from fitune.training.measure import Loading, Measurements
from fitune.training.metrics_file import MetricsFile
from fitune.training.out_of_memory import explain_out_of_memory
from fitune.training.result_check import check_result
from fitune.training.resume_point import checkpoint_to_resume, state_of, steps_left_after
from fitune.training.resumed import FirstStep
from fitune.training.run_report import RunReport
from fitune.training.same_on_all import is_first_of_its_machine, refuse_differences
from fitune.training.state import load_trainable_weights
from fitune.training.trainer import ShardedSFTTrainer
from fitune.training.untrained_tokens import refuse_untrained_control_tokens
from fitune.weights.base_identity import BaseRecord, identify_base
from fitune.weights.load import Placement, load_weights
from fitune.weights.safetensors_files import Checkpoint


def train(run: Run) -> None:
    """Trains as `run` says and leaves adapter/ or model/, metrics.jsonl and loss.png in its folder."""
    end_with_launcher()
    logging.set_verbosity_warning()
    heartbeat, report = Heartbeat(), RunReport()
    lock = None
    if is_main_process() and not is_held_by_launcher():  # by `train`, which has looked
        lock = RunLock(run.folder)
        refuse_to_begin_again(run)
    processes = run.accelerate.num_processes
    report.begin(f"joining {processes} process{'es' * (processes > 1)}")
    with heartbeat.starting():
        mesh = join(run)
    interruption = Interruption(run.folder)
    arguments = training_arguments(run)
    base_folder = local_folder(run.recipe.base.model, run.recipe.base.revision)
    tokenizer = load_tokenizer(run.recipe, base_folder)
    check_prepared(run.recipe, tokenizer)
    _check_compute(run, mesh)
    refuse_untrained_control_tokens(run.recipe, base_folder, tokenizer)
    report.begin("checking the base and the rows")
    with heartbeat.using_files():
        base_record, identity = _identify(run, base_folder, tokenizer, heartbeat)
        checkpoint = checkpoint_to_resume(run, identity, heartbeat)
        arguments.eval_on_start = arguments.eval_on_start and checkpoint is None
        steps_left = steps_left_after(run, checkpoint)
        with Loading() as loading:
            as_trained = {"fp8": run.profile.compute == "fp8", "keep_gathered": run.accelerate.keeps_gathered}
            model = load_sharded_model(run, base_folder, tokenizer, mesh, heartbeat, **as_trained, bar=report.bar)
    heartbeat.count_layers(decoder(model).model.layers)
    report.begin("mapping the rows")
    setup = _planned(run, base_folder)
    planned_gib = gpu_peak(setup).allocated / GIB if setup and setup.on_gpu else None
    measurements = Measurements(run.folder, loading.report, planned_gib)
    trainer = ShardedSFTTrainer(
        run,
        base_record=base_record,
        identity=identity,
        heartbeat=heartbeat,
        adapters_wait=setup is not None and setup.adapters_wait,
        uncast_gradients=setup is not None and setup.uncast_gradients,
        arguments=arguments,
        model=model,
        processing_class=tokenizer,
        train_dataset=rows_on_all_ranks(run, "train", tokenizer, heartbeat),
        eval_dataset=_eval_dataset(run, tokenizer, heartbeat),
        callbacks=[MetricsFile(run.folder), measurements, interruption],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(FirstStep(partial(_accept, run, identity)))
    trainer.add_callback(report)  # after all that decide whether a step is saved
    measurements.tokens_so_far = lambda: trainer._total_train_tokens
    report.last_checkpoint = lambda: trainer.saver.newest
    trainer.also_logged = measurements.since_last_log
    if steps_left == 0:  # interrupted while it saved the result, or no more is asked for now
        with heartbeat.using_files():
            load_trainable_weights(checkpoint, model, share_of(run, mesh.get_rank()))
        trainer.state = state_of(checkpoint)
        interruption.training = True  # a signal waits for the result
        heartbeat.will_save()
        _accept(run, identity, trained=False)
    else:
        wait_for_all(heartbeat.waiting)
        with trainer.saver.finished():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        interruption.leave_if_told(trainer.state)
    trainer.load_best_model()
    trainer.save_model()
    report.begin("comparing what was written with what was trained")
    with heartbeat.using_files():
        check_result(run.result_folder, run, model, share_of(run, mesh.get_rank()))
        wait_for_all(heartbeat.waiting)  # before the run counts as finished
    if is_main_process():
        stopped_early = stops_early(run.recipe, trainer.state.log_history)
        finish(run, trainer.state.global_step, trainer.state.epoch, stopped_early)
    close_process_group()
    if lock:
        lock.release()


def _accept(run: Run, identity: Identity, *, trained: bool = True) -> None:
    """A step is trained as `run` says, or none is left. A resume that fails before leaves settings and result alone."""
    if is_main_process():
        (begin_to_train if trained else accept_settings)(run)
        write_origin(run.folder, identity.model_dump(), resumed=bool(run.resume))


def load_sharded_model(
    run: Run, base_folder: Path, tokenizer, mesh, heartbeat: Heartbeat | None = None, *, fp8=False,
    keep_gathered=False, adapter=True, bar=None,
) -> torch.nn.Module:  # fmt: skip
    """The run's model with this process's share of the weights: skeleton on meta, shard, then stream.

    Call on all ranks: returns when all have read theirs, however long one machine's disk takes.

    `fp8` has it train with fp8 products, `keep_gathered` keep what a forward pass gathers until the backward pass;
    without `adapter` it is the frozen model alone. `bar` shows how far it is; without one, rank 0 draws its own.
    """
    dtype = torch.bfloat16 if run.accelerate.mixed_precision == "bf16" else torch.float32
    stored = trained_dtype(run)
    model = build_skeleton(
        run.recipe, base_folder, tokenizer, dtype, mesh.device_type, stored, adapter=adapter, fp8=fp8
    )
    profile = run.profile
    keep_activations(model, profile.kept_layers, attention=profile.keeps_attention, offload=profile.moves_activations)
    shard(model, mesh, run, dtype, keep_gathered=keep_gathered)
    device = compute_device(mesh)
    share, in_host_ram = share_of(run, mesh.get_rank()), frozenset(kept_in_host_ram(model, run))
    placement = Placement(share.shard, share.shards, device, in_host_ram, ranks_of_a_copy(mesh))
    bar, heartbeat = bar or partial(progress.bar, show=is_main_process()), heartbeat or Heartbeat()
    with Checkpoint(base_folder) as checkpoint, bar("reading the base", checkpoint.nbytes, in_bytes=True) as advance:
        load_weights(model, checkpoint, placement, run.recipe.seed, on_tensor=advance, on_step=heartbeat.count)
    wait_for_all(heartbeat.waiting)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def free_model_memory() -> None:
    """Frees what a sharded model took that nobody names any more: its modules refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_on_all_ranks(run: Run, split: str, tokenizer, heartbeat: Heartbeat) -> TokenisedRows:
    """The rows of a split, mapped. Where they have no tokens yet, rank 0 makes them while the others wait."""
    folder = None
    if is_main_process():
        with heartbeat.using_files():
            folder = folder_with_tokens(run.recipe, split, tokenizer, run.folder / "cache")
    wait_for_rank_0(f"tokens of {split}", heartbeat.waiting)
    with heartbeat.waiting():
        folder = from_rank_0(folder)
    rows = map_rows(run.recipe, split, folder)
    if is_main_process() and folder != Path(run.recipe.data.prepared):
        _say_what_is_cut(run, split, rows)
    return rows


def _say_what_is_cut(run: Run, split: str, rows: TokenisedRows) -> None:
    """About rows that `prepare` did not measure."""
    if too_long := rows_beyond(limit := run.recipe.max_length, rows):
        file = Path(run.recipe.data.prepared) / f"{split}.jsonl"
        print(f"note: {file}: {too_long:,} rows are cut after max_length {limit:,} tokens", file=sys.stderr)


def _check_compute(run: Run, mesh) -> None:
    """Raises UsageError if the profile asks for fp8 and this rank's GPU lacks it. On the CPU says what that means."""
    if run.profile.compute != "fp8":
        return
    if mesh.device_type != "cuda":
        if is_main_process():
            print("note: profile.compute fp8 is emulated on the CPU: the same arithmetic, slower", file=sys.stderr)
        return
    capability = compute_capability(compute_device(mesh))
    if capability < FP8_CAPABILITY:
        raise UsageError(
            f"profile.compute fp8 needs compute capability {FP8_CAPABILITY}, {torch.cuda.get_device_name()} has "
            f"{capability:.1f}; use --set profile.compute=bf16"
        )


def _planned(run: Run, base_folder: Path) -> Setup | None:
    """What `plan` reckons with; None for a model that it doesn't know."""
    try:
        return setup_to_train(run, find_shape(str(base_folder)))
    except UsageError:
        return None


def _identify(run: Run, base_folder: Path, tokenizer, heartbeat: Heartbeat) -> tuple[BaseRecord, Identity]:
    """What adapter and checkpoints will remember of their origin.

    One rank of each machine reads its base and data for it. Raises UsageError if machines differ.
    """
    found = None, None
    if is_first_of_its_machine():
        record = identify_base(run.recipe.base, base_folder)
        found = record, identify(run, record, tokenizer)
    refuse_differences(found[1], heartbeat.waiting)
    with heartbeat.waiting():
        return from_rank_0(found)


def _eval_dataset(run: Run, tokenizer, heartbeat: Heartbeat) -> TokenisedRows | None:
    if run.recipe.training.get("eval_strategy", "no") == "no":
        return None
    return rows_on_all_ranks(run, "test", tokenizer, heartbeat)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fitune.training.train", description=__doc__)
    parser.add_argument("run", type=Path, help="run.yaml, or the folder that holds it")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    options = parser.parse_args(arguments)
    run_stage(options.run, train, resume=options.resume)


def _is_no_comparison_with_the_checkpoint(record: LogRecord) -> bool:
    """Trainer warns of steps and rows a pass that a resume changed: these take effect here."""
    return "do not match the ones in the `trainer_state.json`" not in record.getMessage()


def run_stage(path: Path, stage, explain=explain_out_of_memory, **changes) -> None:
    """Runs `stage` on a run.yaml; an expected error becomes one line, on however many ranks, and its exit code.

    `explain(run, rank, error)` has the words for memory that ran out.
    """
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between trl, peft and transformers, not ours to mend
    getLogger("transformers.trainer_utils").addFilter(_is_no_comparison_with_the_checkpoint)
    try:
        run = runs.load(path)
        if not run.accelerate.use_cpu:
            let_segments_grow()
        stage(run.model_copy(update={key: value for key, value in changes.items() if value}))
    except FituneError as error:
        if is_first_to_fail():
            say_while_training(f"{'stopped' if error.exit_code == INTERRUPTED else 'error'}: {error}")
        close_process_group(patience=5)
        sys.exit(error.exit_code)
    except Exception as error:
        if is_out_of_memory(error):
            say_while_training(f"error: {explain(run, int(os.environ.get('RANK', 0)), error)}")
            sys.exit(FituneError.exit_code)
        if gone := _who_is_gone(error):  # and mostly said why
            say_while_training(f"rank {os.environ.get('RANK', 0)}: {gone}")
        else:
            traceback.print_exc()
        sys.exit(CRASHED)


def _who_is_gone(error: Exception) -> str:
    """Whom a collective, or the store that lies on machine 0, found missing; '' for other errors."""
    if isinstance(error, DistNetworkError):
        return "machine 0 is gone, or cannot be reached"
    return "another rank is gone" if re.search("Connection (closed|reset) by peer", str(error)) else ""  # gloo's words


if __name__ == "__main__":
    as_rank(main)
