"""The command `dflash-kernels`."""


def main() -> None:
    from .app import main as run

    run()
