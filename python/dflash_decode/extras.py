"""What messages say of the package's extras."""


def how_to_get(extra: str) -> str:
    return f"in a clone, pip install --no-build-isolation '.[{extra}]'"
