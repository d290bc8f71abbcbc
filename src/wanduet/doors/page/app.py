"""Adds the web page to a server: static files that use the server's own API, and a few routes of their own."""

from fastapi import FastAPI

from wanduet.config import EngineConfig
from wanduet.doors.http.context import ServerContext
from wanduet.doors.http.restore import add_restore
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.routes import page_router


def mount_page(app: FastAPI, config: EngineConfig) -> FastAPI:
    """Add the page at `/` to a server's application."""
    context: ServerContext = app.state.context
    actions = PageActions(context, config)
    app.include_router(page_router(actions))
    add_restore(app, actions.read)
    return app
