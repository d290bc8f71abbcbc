"""The flags of webhooks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from wanduet.jobs.webhooks import WebhookSettings

WEBHOOKS = Group("Webhooks", sort_key=0.5)  # between those of the server and of a cluster


@dataclass(frozen=True, slots=True)
class WebhookFlags:
    """Flags of webhooks: requests that the server sends when a job has completed or failed."""

    webhook_url: Annotated[
        str | None, Parameter(group=WEBHOOKS, help="Address that is called when a job has completed or failed.")
    ] = None
    webhook_allow: Annotated[
        tuple[str, ...],
        Parameter(
            group=WEBHOOKS, help="A host that a client may have called, by webhook_url in its request.", negative=""
        ),
    ] = ()
    webhook_secret: Annotated[
        str | None,
        Parameter(
            group=WEBHOOKS,
            help="Signs these calls: whsec_ and Base64. Better as WANDUET_WEBHOOK_SECRET, where no one sees it.",
        ),
    ] = None

    def webhooks(self) -> "WebhookSettings":
        """Return the settings. Raises ConfigError."""
        from wanduet.jobs.webhooks import WebhookSettings

        return WebhookSettings.parse(self.webhook_secret, self.webhook_url, self.webhook_allow)
