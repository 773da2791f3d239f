"""Plots the progress of a training run, readable in greyscale."""

from pathlib import Path


def plot(history: list[dict], file: Path) -> None:
    """Loss and acceptance length against minutes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [h["minutes"] for h in history]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(minutes[1:], [h["loss"] for h in history][1:], color="0.6", label="training (soft and hard labels)")
    left.plot(minutes[1:], [h["held_out_loss"] for h in history][1:], color="0.1", label="held out (hard labels)")
    left.set(xlabel="minutes of training", ylabel="weighted cross-entropy, nats")
    left.legend(frameon=False)
    right.plot(minutes, [h["acceptance"] for h in history], color="0.1", marker="o", markersize=3)
    right.set(xlabel="minutes of training", ylabel="tokens a step, held out", ylim=(1, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
