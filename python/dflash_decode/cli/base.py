"""The command `dflash-kernels` of a base install, without typer and rich: `info` answers, and every other command says
which extra it needs."""

from importlib.metadata import entry_points, version

from ..extras import how_to_get
from .streams import UsageError, attempt

EXTRAS = {"bench": "bench", "serve": "serve"}  # of the commands that need another extra than this one:
EXTRA = "decode"


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. An error prints one line on standard error."""
    return attempt(lambda: _run(arguments), "--debug" in arguments)


def _run(arguments: list[str]) -> int:
    command, *options = arguments or [""]
    needs = _needs()
    if command == "--version":
        print(version("dflash-kernels"))
    elif command in ("", "--help") or command == "info" and "--help" in options:
        print(_help(needs))
        return 0 if command else 2
    elif command in needs:
        raise UsageError(f"{command} {needs[command]}")
    elif command != "info":
        raise UsageError(f"the command must be one of info, {', '.join(needs)}; got {command[:80]!r}")
    elif unknown := set(options) - {"--json", "--debug"}:
        raise UsageError(f"info takes --json and --debug; got {sorted(unknown)[0][:80]!r}")
    else:
        from . import info

        info.show("--json" in options)
    return 0


def _needs() -> dict[str, str]:
    """What each command that is not here needs."""
    names = ["generate", "chat", *(command.name for command in entry_points(group="dflash_kernels.commands"))]
    extras = {name: EXTRAS.get(name, EXTRA) for name in names}
    return {name: f"needs the extra {extra}: {how_to_get(extra)}" for name, extra in extras.items()}


def _help(needs: dict[str, str]) -> str:
    commands = {"info": "versions, what is built, what is missing and how to get it; --json: as JSON"} | needs
    return "\n".join(["Usage: dflash-kernels [--version] [--help] COMMAND", "",
                      "DFlash speculative decoding with fused kernels.", "", "Commands:",
                      *(f"  {name:<8}  {text}" for name, text in commands.items())])
