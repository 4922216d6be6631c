"""Average metrics over the steps of an update; estimate the error of a ratio of sums."""


def averages(steps):
    """Average metrics, {name: (mean of a step, how many it is over)} per step -> {name: mean over all}.

    An empty dict is a step that was not made; their number is "empty_minibatches".
    """
    made = [metrics for metrics in steps if metrics]
    columns = {name: [metrics[name] for metrics in made] for name in (made[0] if made else ())}
    means = {name: sum(x * n for x, n in column) / sum(n for _, n in column)
             for name, column in columns.items()}
    return means | {"empty_minibatches": len(steps) - len(made)}


def ratio_of_sums(above, below):
    """Return p, sum over sum of samples (arrays or tensors alike), and scores whose mean errs as p does: by
    linearisation, p is off by the mean of (above - p below) / mean(below)."""
    p = above.sum() / below.sum()
    return p, (above - p * below) / below.mean()


def error_of_mean(scores):
    """Return the standard error of the mean, 0, of independent scores (n,); NaN of one."""
    n = len(scores)
    return ((scores**2).sum() / n / (n - 1)) ** 0.5 if n > 1 else float("nan")
