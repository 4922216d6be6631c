"""Average what is measured at each step of an update."""


def averages(steps):
    """Average metrics, {name: (mean of a step, how many it is over)} per step -> {name: mean over all}.

    An empty dict is a step that was not made; their number is "empty_minibatches".
    """
    made = [metrics for metrics in steps if metrics]
    columns = {name: [metrics[name] for metrics in made] for name in (made[0] if made else ())}
    means = {name: sum(x * n for x, n in column) / sum(n for _, n in column)
             for name, column in columns.items()}
    return means | {"empty_minibatches": len(steps) - len(made)}
