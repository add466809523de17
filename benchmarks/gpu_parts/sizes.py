"""What recipes are cut down to where there is no GPU."""

TINY = (
    "--model.n-layers=2", "--model.d-model=64", "--model.n-heads=2", "--model.seq-len=64",
    "--model.vocab-size=300", "--model.attention.band=16", "--batch.global-batch-size=4",
    "--batch.microbatch-size=2", "--optimizer.peak-lr=1e-3", "--optimizer.min-lr=1e-4",
    "--data.eod-id=0", "--mesh.cpu-devices=1",
)  # fmt: skip


def recipe_args(task, *args):
    """Return the command line of a recipe without a corpus, tiny if the task is."""
    return [*args, "--data.mock", *(TINY if task.tiny else ())]
