"""Makes Triton's interpreter work with a NumPy newer than it supports."""


def accept_newer_numpy() -> None:
    """Triton 3.6 makes a loop's bound, an array of one element, an integer in a way that NumPy 2.4 refuses. For the
    rest of the process; does nothing in later versions."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_index_too
