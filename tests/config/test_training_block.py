"""Fields of a recipe's `training:` block that fitune owns elsewhere, refuses or has a nearest one for."""

import pytest
from one_run import message_of

from fitune.config.installed_names import sft_config_fields
from fitune.config.optimizers import ARGUMENTS, all_optimizers, nearest_fit
from fitune.config.run import resolve
from fitune.config.training_fields import CHOICES, LIMITS, NEEDS_WORKERS, OWNED_ELSEWHERE, REFUSED


@pytest.mark.parametrize("field", OWNED_ELSEWHERE)
def test_training_field_owned_elsewhere_says_where(field, write):
    paths = write("recipe", "num_train_epochs: 1", f"{field}: 1")
    message = message_of(paths)
    assert f"training.{field} is not set here: {OWNED_ELSEWHERE[field]}" in message
    assert str(paths["recipe"]) in message
    assert field in sft_config_fields(), "TRL has no such field any more"


@pytest.mark.parametrize("name", sorted(all_optimizers()))
def test_every_optimizer_resolves_or_names_the_nearest_that_works(name, write):
    sets = (f"training.optim={name}",)
    if name in ARGUMENTS:
        paths = write()
        assert resolve(str(paths["recipe"]), str(paths["profile"]), sets).recipe.training["optim"] == name
        return
    message = message_of(write(), sets)
    assert f"training.optim={name} " in message and nearest_fit(name) in ARGUMENTS
    assert message.endswith(f"the nearest that works: {nearest_fit(name)}")


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_training_field_says_why(field, write):
    message = message_of(write("recipe", "num_train_epochs: 1", f"{field}: 1"))
    assert f"training.{field} cannot be set: {REFUSED[field]}" in message


def test_tables_name_fields_that_exist():
    for table in (OWNED_ELSEWHERE, REFUSED, LIMITS, CHOICES, NEEDS_WORKERS):
        assert set(table) <= set(sft_config_fields())
    assert not set(OWNED_ELSEWHERE) & set(REFUSED)
