"""What `plan` says of a run, as the docs write it, and the docs' pages, to look for it there."""

from pages import ROOT, text

from fitune.planning.fill import resolve
from fitune.planning.limits import limits_of
from fitune.planning.memory import gpu_peak
from fitune.planning.plan import Plan, make_plan
from fitune.planning.sizes import GIB, Setup
from fitune.planning.words import rounded

SMALL = ("profile.optimizer_state=bf16_8bit",)


def planned(recipe: str, profile: str, sets: tuple[str, ...] = ()) -> Plan:
    run = resolve(recipe, profile, sets)
    return make_plan(run, limits_of(run))


def gpu_gib(plan: Plan) -> str:
    return f"{plan.gpu.total / GIB:.1f}"


def host_gib(plan: Plan) -> str:
    return f"{sum(plan.host[plan.host_phase].values()) / GIB:.1f}"


def tensors_gib(setup: Setup) -> str:
    return f"{gpu_peak(setup).allocated / GIB:.1f}"


def card_gib(setup: Setup) -> str:
    return f"{gpu_peak(setup).total / GIB:.1f}"


def step(plan: Plan) -> str:
    return f"{rounded(plan.time.parts['total'])} s"


def speed(plan: Plan) -> str:
    return rounded(plan.time.tokens_per_second)


def one_line(page: str) -> str:
    return " ".join(text(ROOT / "docs" / page).split())


def table(page: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the only table of a page that has these columns."""
    blocks = (block.strip().splitlines() for block in text(ROOT / "docs" / page).split("\n\n"))
    tables = [[_cells(line) for line in block] for block in blocks if block and block[0].startswith("|")]
    [(header, _, *rows)] = [cells for cells in tables if set(columns) <= set(cells[0])]
    return [dict(zip(header, row, strict=True)) for row in rows]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
