"""The `training:` block becomes an SFTConfig before any weight is read."""

import pytest
from ranks import run_ranks, train_here


def test_what_transformers_refuses_is_refused_before_weights_are_read(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path / "run", training={"tf32": True})  # on the CPU; the command line says so earlier
    (tmp_path / "no_weights").mkdir()
    for file in tiny_base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "no_weights" / file.name).write_bytes(file.read_bytes())
    base = run.recipe.base.model_copy(update={"model": str(tmp_path / "no_weights")})
    run = run.model_copy(update={"recipe": run.recipe.model_copy(update={"base": base})})
    with pytest.raises(RuntimeError, match=r"run\.yaml: training: refused by TRL's SFTConfig: --tf32 requires"):
        run_ranks(train_here, 1, run)
