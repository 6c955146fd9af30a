"""Which transforms of torch and of JAX each layer works under, from the product that the tests run.

    python benchmarks/transforms.py [--framework torch|jax] [--layers TEXT] [--output docs/transforms.md]

Each entry of the table is the error of the result, relative, against the closed form of the layer under plain
derivatives of the framework; or "raises", where an error says why and what to do instead, quoted below the
table. There is no third outcome: a wrong result ends the script. Tables of the other framework stay.
"""

import argparse
import importlib
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from report import table, write_section  # noqa: E402

from frontends import FRONTENDS  # noqa: E402
from transform_layers import LAYERS  # noqa: E402
from transforms import Subject  # noqa: E402

TITLE = """# Transforms

Layers under the transforms of torch and JAX, in double precision but for the rows that say otherwise. An
entry is the relative error against the closed form of the layer; "raises" has its message below the table.
"""


def outcome(subject, transform, tolerance, expected_message):
    """The entry of the table, and the message of an error."""
    try:
        error = subject.error(transform)
    except Exception as error:
        if expected_message is None or not re.search(expected_message, str(error)):
            raise
        return "raises", reason(str(error))
    if not error <= (transform.tolerance or tolerance):
        raise AssertionError(f"wrong result: error {error:.1e}")
    return f"{error:.0e}", None


def reason(message):
    """What the library said, without what torch.compile puts around it."""
    quoted = re.search(r"\(reason: (.*?)\)\n", message, re.DOTALL)
    return (quoted[1] if quoted else message.splitlines()[0]).strip()


def tables(framework, names):
    """The lines of the table, after each layer."""
    frontend = FRONTENDS[framework]()
    transforms = getattr(importlib.import_module(f"{framework}_transforms"), framework.upper())
    columns, messages = [], {}
    for name in names:
        case = LAYERS[name]
        subject, refused = Subject(frontend, case), case.refuses.get(framework, {})
        entries = []
        for key, transform in transforms.items():
            entry, message = outcome(subject, transform, case.tolerance, refused.get(key))
            print(framework, name, key, entry, sep="\t", flush=True)
            entries.append(entry)
            if message:
                messages.setdefault(message, []).append(f"{name} under {key}")
        columns.append(entries)
        rows = [[key, *entries] for key, *entries in zip(transforms, *columns, strict=True)]
        lines = table([["transform", *names[: len(columns)]], *rows])
        yield lines + ["", *(f"- {', '.join(where)}: {message}" for message, where in messages.items())]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--framework", choices=FRONTENDS, default="torch")
    parser.add_argument("--layers", default="", help="only those whose name contains this text")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "transforms.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.framework == "jax":
        import jax

        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_enable_x64", True)
    names = [name for name in LAYERS if options.layers in name]
    for lines in tables(options.framework, names):
        write_section(options.output, TITLE, "transforms.py", options.framework, lines)


if __name__ == "__main__":
    main()
