"""The installed releases still have every private name that fitune relies on, and fitune relies on no other."""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from private_names import PRIVATE_NAMES, PrivateName

PACKAGE = Path(__file__).resolve().parents[2] / "fitune"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED_ELSEWHERE = {("data/check_worker.py", "_exit"), ("export/llama_cpp.py", "_exit")}
ALLOWED_ELSEWHERE |= {("training/distributed.py", name) for name in ("_exit", "_shutdown", "_run_exitfuncs")}
"Python's own: os._exit, which is documented, and what multiprocessing calls before it in its own processes."


# The libraries' side


def problem(entry: PrivateName) -> str | None:
    """What an installed release has changed about a name, or None."""
    module_name, _, path = entry.name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return f"{module_name} is gone"
    source = inspect.getsource(module)
    *parents, last = path.split(".")
    owner = module
    for part in parents:
        if not hasattr(owner, part):
            # an attribute of instances stands in the source alone
            return None if _is_assigned(part, source) else f"{module_name} has no {part}"
        owner = getattr(owner, part)
    if not hasattr(owner, last) and not _is_assigned(last, _sources(owner, source)):
        return f"{'.'.join(parents) or module_name} has no {last}"
    if entry.parameters is not None:
        given = parameters(getattr(owner, last))
        if given != list(entry.parameters):
            return f"takes {given}, not {list(entry.parameters)}"
    if entry.called_as and entry.called_as not in source and entry.called_as not in _sources(owner, source):
        return f"{module_name} no longer says `{entry.called_as}`"
    return None


def parameters(function) -> list[str]:
    """The names a function takes; of torch's operators those up to the last that has no default, and `scale`."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        arguments = function.default._schema.arguments
        return [a.name for a in arguments if not a.has_default_value() or a.name == "scale"]
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _sources(owner, source: str) -> str:
    """Of a class, the modules it and its bases are written in."""
    if not inspect.isclass(owner):
        return source
    modules = {inspect.getmodule(base) for base in owner.__mro__ if base is not object}
    return "\n".join(inspect.getsource(module) for module in modules if getattr(module, "__file__", None))


def _is_assigned(name: str, source: str) -> bool:
    return re.search(rf"^\s*(self\.)?{name}\s*[:=]|self\.{name}\b|[\"']{name}[\"']", source, re.MULTILINE) is not None


@pytest.mark.parametrize("library", sorted({entry.library for entry in PRIVATE_NAMES}))
def test_the_installed_release_has_every_private_name(library):
    found = {entry.name: problem(entry) for entry in PRIVATE_NAMES if entry.library == library}
    changed = [f"{name}: {what}" for name, what in found.items() if what]
    assert not changed, "\n".join([f"this release of {library} has changed what fitune relies on:", *changed])


def test_a_changed_name_is_a_problem():
    """The check itself: a missing module, class, attribute, parameter and caller."""
    for name in ("torch._gone:x", "torch:Gone.x", "torch.optim.lr_scheduler:LRScheduler._gone_rate"):
        assert problem(PrivateName(name, (), "", "")), name
    norm = PrivateName("transformers:Trainer._get_grad_norm", (), "", "", parameters=("model",))
    assert "takes" in problem(norm)
    save = PrivateName("transformers:Trainer._save_checkpoint", (), "", "", called_as="save(1, 2, 3)")
    assert "no longer says" in problem(save)


# fitune's side


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")


OWN = {
    node.name
    for path in FILES
    for node in ast.walk(tree(path))
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and is_private(node.name)
}
"Private functions, methods and classes of fitune itself."


def library_imports(path: Path) -> dict[str, str]:
    """Local name -> `module:name` of what a file imports from the libraries."""
    found = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in LIBRARIES:
            found |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    found[alias.asname or alias.name] = f"{alias.name}:"
    return found


def private_imports(path: Path) -> set[str]:
    """Names that a file imports from private modules, and private names from any."""
    parts = {name: re.split("[.:]", target) for name, target in library_imports(path).items()}
    return {found[-1] for found in parts.values() if any(map(is_private, found))}


def private_attributes(path: Path) -> set[str]:
    """`x._name` where x is no instance of the class that the code stands in, read, set or asked for by text."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            swapped = node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            if (is_private(node.attr) and not on_self) or swapped:
                found.add(node.attr)
        elif isinstance(node, ast.Call):
            texts = (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
            found |= {text for text in texts if text.isidentifier() and is_private(text) and not text.isupper()}
    return {name for name in found - OWN if (str(path.relative_to(PACKAGE)), name) not in ALLOWED_ELSEWHERE}


def private_in_subclasses(path: Path) -> set[str]:
    """What a subclass of a library's class overrides, reads or sets on itself that is the library's and private.

    Of a class that is private itself, every name is.
    """
    imports, found = library_imports(path), set()
    for node in ast.walk(tree(path)):
        bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
        for target in (imports[base] for base in bases if base in imports):
            module, _, name = target.partition(":")
            library_class = getattr(importlib.import_module(module), name)
            all_private = any(map(is_private, re.split("[.:]", target)))
            source = _sources(library_class, "")
            for used in _names_on_self(node):
                if all_private or (is_private(used) and re.search(rf"(self\.|def ){used}\b", source)):
                    found.add(used)
    return found


def _names_on_self(node: ast.ClassDef) -> set[str]:
    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.endswith("__")}
    attributes = (part for part in ast.walk(node) if isinstance(part, ast.Attribute))
    return methods | {a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id == "self"}


def members_of_private_classes(path: Path) -> set[str]:
    """What is read from parameters that are annotated with a class of a private module."""
    private, found = private_imports(path), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            of_private_class = {a.arg for a in node.args.args if a.annotation and ast.unparse(a.annotation) in private}
            attributes = (part for part in ast.walk(node) if isinstance(part, ast.Attribute))
            found |= {a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id in of_private_class}
    return found


def uses(path: Path) -> set[str]:
    """Every private name of a library that a file uses, as far as its source shows.

    What comes out of a loop or a call has no type there: a member without an underscore goes unseen.
    """
    every = private_imports(path) | private_attributes(path) | private_in_subclasses(path)
    return every | members_of_private_classes(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_private_name_in_use_is_listed(path):
    file = str(path.relative_to(PACKAGE))
    listed = {entry.last for entry in PRIVATE_NAMES if file in entry.used_by}
    unlisted = uses(path) - listed
    assert not unlisted, f"{file} uses {sorted(unlisted)}: list them in tests/contracts/private_names.py"


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_every_listed_name_is_in_use(entry):
    for file in entry.used_by:
        assert re.search(rf"\b{entry.last}\b", (PACKAGE / file).read_text(encoding="utf-8")), file
