"""What users may import, and what `import lorica` costs them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import lorica

PUBLIC = (
    *(
        "Adapter",
        "BoostingCallback",
        "LowRank",
        "attach_merge",
        "compress",
        "create_adapter",
        "extract",
        "fit",
        "fuse",
        "inject",
        "load_adapter",
    ),
    *(
        "load_base",
        "load_method",
        "load_task",
        "prepare_merge",
        "remove",
        "save_adapter",
        "target_modules",
        "unfuse",
        "__version__",
    ),
)


def test_the_public_names_are_these() -> None:
    assert sorted(lorica.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(lorica, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        lorica.no_such_name  # noqa: B018


def test_help_and_lists_import_nothing_heavy() -> None:
    commands = [["--help"], ["list"], ["list", "flags"], ["list", "keys"], ["train", "--help"]]
    heavy = ("torch", "transformers", "datasets", "numpy", "pyarrow")
    code = (
        "import sys\n"
        "from lorica.cli import app\n"
        f"for words in {commands!r}:\n"
        "    try: app(words)\n"
        "    except SystemExit: pass\n"
        f"    found = [name for name in {heavy!r} if name in sys.modules]\n"
        "    if found: sys.exit(f'{words} imports {found}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
