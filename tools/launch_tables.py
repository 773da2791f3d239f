"""Sets the GPU kernels' launch tables from the results of a sweep on a GPU.

    python -m tools.launch_tables SWEEP.json [PACKAGE]

SWEEP.json comes from `make gpu PART=c` (bench/gpu/sweep.py). Each measured entry records where it was measured, and
gets the fastest setting if that is another one. PACKAGE: the folder of the kernels' sources, by default
dflash_kernels/_triton. All tables are read and compared with the measured ones before any is written.
"""

import ast
import json
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "dflash_kernels" / "_triton"
MEASURED = re.compile(r"#.*measured on .*")


class Stale(ValueError):
    """A table differs from the measured one."""


def as_key(value):
    return tuple(map(as_key, value)) if isinstance(value, list) else value


def text_of(node: ast.AST) -> str:
    return ast.unparse(node)


class Table:
    """One assignment of a module's source: a dict, a dict of dicts, or a number."""

    def __init__(self, source: str, name: str):
        self.source, self.name = source, name
        self.node, self.value = self._find()
        self.comments: dict[tuple, str] = {}
        if isinstance(self.value, ast.Dict):
            self.entries = self._entries(self.value, ())

    def _find(self):
        for node in ast.parse(self.source).body:
            if isinstance(node, ast.Assign):
                target = node.targets[0]
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                for at, one in enumerate(names):
                    if isinstance(one, ast.Name) and one.id == self.name:
                        return node, node.value.elts[at] if isinstance(target, ast.Tuple) else node.value
        raise Stale(f"there is no table {self.name}")

    def _entries(self, value: ast.Dict, path: tuple) -> dict:
        found = {}
        for key, item in zip(value.keys, value.values, strict=True):
            at = (*path, self._constant(key))
            if isinstance(item, ast.Dict):
                found[at[-1]] = (text_of(key), self._entries(item, at))
            else:
                found[at[-1]] = (text_of(key), text_of(item))
                line = self.source.splitlines()[item.end_lineno - 1]
                if comment := MEASURED.search(line):
                    self.comments[at] = comment[0]
        return found

    @staticmethod
    def _constant(node):
        """(1 << 62) is a key too."""
        return eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}})  # noqa: S307

    def get(self, path: tuple) -> str:
        if not path:
            return text_of(self.value)
        held = self.entries
        for key in path[:-1]:
            held = held[key][1]
        return held[path[-1]][1]

    def set(self, path: tuple, value: str, where: str) -> None:
        if not path:
            self._set_number(value, where)
            return
        held = self.entries
        for key in path[:-1]:
            held = held[key][1]
        held[path[-1]] = (held[path[-1]][0] if path[-1] in held else repr(path[-1]), value)
        self.comments[path] = f"# measured on {where}"
        lines = self.source.splitlines(keepends=True)
        begin, end = self.value.lineno - 1, self.value.end_lineno
        before = lines[begin].encode()[:self.value.col_offset].decode()
        after = lines[end - 1].encode()[self.value.end_col_offset:].decode()
        self.source = "".join(lines[:begin]) + before + self._dict(self.entries, (), 4) + after + "".join(lines[end:])
        self.__init__(self.source, self.name)

    def _dict(self, entries: dict, path: tuple, indent: int) -> str:
        lines = ["{"]
        for key, (text, value) in entries.items():
            nested = isinstance(value, dict)
            item = self._dict(value, (*path, key), indent + 4) if nested else value
            comment = self.comments.get((*path, key), "") if not nested else ""
            lines.append(" " * indent + f"{text}: {item}," + f"  {comment}" * bool(comment))
        return "\n".join([*lines, " " * (indent - 4) + "}"])

    def _set_number(self, value: str, where: str) -> None:
        lines = self.source.splitlines(keepends=True)
        at, node = self.value.lineno - 1, self.value
        code = lines[at].rstrip("\n")
        code = code[:node.col_offset] + value + code[node.end_col_offset:]
        code = re.sub(rf"[;#] {self.name} measured on [^;]*", "", code).rstrip()
        lines[at] = code + ("; " if "#" in code else "  # ") + f"{self.name} measured on {where}\n"
        self.source = "".join(lines)
        self.__init__(self.source, self.name)


def apply(sweep: dict, package: Path) -> dict[Path, str]:
    """The new sources of the modules whose tables were measured. Prints the settings that change."""
    sources: dict[Path, str] = {}
    for entry in sweep["entries"]:
        if not any("gain" in tried for tried in entry["tried"]):
            continue
        noun, name = entry["table"].split(".")
        file, path = package / f"{noun}.py", tuple(map(as_key, entry["key"]))
        table = Table(sources.get(file) or file.read_text(encoding="utf-8"), name)
        if (now := table.get(path)) != entry["now"]:
            raise Stale(f"{entry['table']} {path} must be {entry['now']}, which was measured; got {now}")
        nested = len(path) > 1  # by generation of chips: another one's entry is left as it is
        if nested and path[-1] != sweep["major"]:
            if not entry["best"]:
                continue
            path = (*path[:-1], sweep["major"])
        table.set(path, entry["best"] or entry["now"], sweep["folder"])
        sources[file] = table.source
        if entry["best"]:
            print(f"{entry['table']} {path}: {entry['best']} in place of {entry['now']}, {entry['gain']:.2f} x as fast")
    return sources


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print(__doc__.split("\n\n")[1].strip(), file=sys.stderr)
        return 2
    try:
        sweep = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        sources = apply(sweep, Path(sys.argv[2]) if len(sys.argv) == 3 else PACKAGE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"launch_tables: {sys.argv[1]} must be a sweep of these tables; got {error}", file=sys.stderr)
        return 2
    for file, source in sources.items():
        file.write_text(source, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
