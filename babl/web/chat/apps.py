"""The Django app."""

from django.apps import AppConfig


class ChatConfig(AppConfig):
    """The configuration that Django finds by INSTALLED_APPS."""

    name = "babl.web.chat"
    label = "chat"
