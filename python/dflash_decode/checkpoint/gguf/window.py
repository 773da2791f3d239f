"""The sliding windows that a GGUF file's metadata describe."""

from ..fields import Fields


def read_window(f: Fields, arch: str, layers: int, every: int = 0) -> dict:
    """sliding_window and layer_types; {} if there is no window. The pattern has an entry for each layer, true where it
    slides, or is a number n: all layers but every n-th slide, and all if n is 0. every: n where there is no pattern."""
    window = f.whole(f"{arch}.attention.sliding_window", 0, least=0)
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = f.get(key)
    if not window:
        return {}
    if pattern is None or isinstance(pattern, int) and not isinstance(pattern, bool):
        n = f.whole(key, every, least=0)
        slides = [n == 0 or i % n < n - 1 for i in range(layers)]
    else:
        slides = list(f.items(key, each=f"{layers} layers"))
    if len(slides) != layers or not all(each in (0, 1) for each in slides):
        f.refuse(key, f"a list of {layers} layers, or a number", slides)
    return {"sliding_window": window,
            "layer_types": ["sliding_attention" if each else "full_attention" for each in slides]}
