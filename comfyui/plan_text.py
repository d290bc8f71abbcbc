"""A plan in words."""

from typing import Any


def plan_text(plan: dict[str, Any]) -> str:
    """Return a plan, as `wanduet plan --json` prints it, in a few lines."""
    from wanduet.config import format_bytes, format_seconds

    verdict = f"It fits, and takes about {format_seconds(plan['predicted_seconds']['total'])}."
    lines = [verdict if plan["fits"] else "It does not fit."]
    for device in plan["devices"]:
        peak = max(device["phases"].values(), default=0)
        limit = format_bytes(device["limit_bytes"])
        lines.append(f"{device['name']} ({device['role']}): {format_bytes(peak)} at the peak, of {limit}")
    lines.append(f"host: {format_bytes(plan['host_bytes'])}, of {format_bytes(plan['host_limit_bytes'])}")
    lines += [f"{choice['setting']} {choice['value']}: {choice['why']}" for choice in plan["choices"]]
    for nearest in plan["nearest_that_fits"]:
        change = ", ".join(f"{name} {value}" for name, value in nearest.items() if not name.startswith("predicted"))
        lines.append(f"This fits: {change} (about {format_seconds(nearest['predicted_seconds'])})")
    return "\n".join(lines)
