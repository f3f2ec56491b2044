"""The app's name for Django."""

from django.apps import AppConfig


class ChatConfig(AppConfig):
    """Found by Django in INSTALLED_APPS."""

    name = "babl.web.chat"
    label = "chat"
