"""The line that a person reads after each step."""

import math


def describe(i, args, metrics, seconds_left):
    """Return the line of step i."""
    if args.algo == "ppo":
        m = metrics
        # an estimator may ask no critic
        ev = "" if math.isnan(m["explained_variance"]) else f"ev {m['explained_variance']:+.2f}  "
        body = (f"reward {m['reward']:+6.2f}  success {100 * m['success']:5.1f} %  "
                f"per step {100 * m['per_step']:5.1f} %  kl {m['approx_kl']:.1e}  "
                f"clip {100 * m['clipfrac']:4.1f} %  {ev}entropy {m['entropy']:.2f}  "
                f"grad {m['grad_norm']:.2f}  {m['rollout_tokens_per_second']:,.0f} tok/s")
    elif metrics["nll"] is None:
        body = "nothing to learn from"
    else:
        body = (f"nll {metrics['nll']:.4f}  entropy {metrics['entropy']:.3f}  "
                f"grad {metrics['grad_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tok/s")
    if metrics["empty_minibatches"]:
        body += f"  empty {metrics['empty_minibatches']}"
    if metrics["skipped"]:
        body += f"  skipped {metrics['skipped']}"
    return f"step {i:>4}/{args.steps}  {body}  left {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"
