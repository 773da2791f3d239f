"""A model file in pieces, for machines that take only little at a time."""

from pathlib import Path

PIECE = 48_000_000  # bytes


def split(file: Path, folder: Path, size: int = PIECE) -> list[Path]:
    """Writes `file` as folder/<name>.000, .001, ...; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    with file.open("rb") as whole:
        while piece := whole.read(size):
            out.append(folder / f"{file.name}.{len(out):03d}")
            out[-1].write_bytes(piece)
    return out


def join(folder: Path, work: Path) -> Path:
    """The file whose pieces `folder` has, joined in `work`."""
    found = sorted(folder.glob("*.[0-9][0-9][0-9]"))
    names = {piece.name[:-4] for piece in found}
    if len(names) != 1 or [int(piece.suffix[1:]) for piece in found] != list(range(len(found))):
        raise ValueError(f"{folder}: expected the pieces NAME.000, NAME.001, ... of one file; "
                         f"got {[piece.name for piece in found]}")
    out = work / names.pop()
    if not out.is_file() or out.stat().st_size != sum(piece.stat().st_size for piece in found):
        part = out.with_name(out.name + ".part")
        with part.open("wb") as whole:
            for piece in found:
                whole.write(piece.read_bytes())
        part.rename(out)
    return out
