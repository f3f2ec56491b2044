"""Every address of the server; /healthz and /static/ are answered before Django (`babl.web.asgi`)."""

from django.urls import path, re_path

from babl.web.chat import api, views
from babl.web.chat.endpoint import endpoint

urlpatterns = [
    path("", endpoint(GET=views.index)),
    path("c/<uuid:id>/", endpoint(GET=views.index)),
    path("sets/", endpoint(GET=views.sets_page)),
    path("settings/", endpoint(GET=views.settings_page)),
    path("login/", endpoint(GET=views.login_page, POST=views.login_page)),
    path("logout/", endpoint(POST=views.logout_page)),
    path("api/conversations", endpoint(GET=views.list_conversations, POST=views.create_conversation)),
    path(
        "api/conversations/<uuid:id>",
        endpoint(GET=views.get_conversation, PATCH=views.change_conversation, DELETE=views.purge_conversation),
    ),
    path("api/conversations/<uuid:id>/messages", endpoint(GET=views.list_messages, POST=views.ask)),
    path("api/conversations/<uuid:id>/export", endpoint(GET=views.export_conversation)),
    path("api/export", endpoint(GET=views.export_all)),
    path("api/import", endpoint(POST=views.import_file)),
    path("api/messages/<uuid:id>/again", endpoint(POST=views.ask_again)),
    path("api/messages/<uuid:id>/stop", endpoint(POST=views.stop)),
    path("api/messages/<uuid:id>/feedback", endpoint(PUT=views.judge, DELETE=views.forget_judgement)),
    path("api/events", endpoint(GET=views.events)),
    path("api/count", endpoint(POST=views.count)),
    path("api/passages", endpoint(GET=views.list_passages, POST=views.add_passage)),
    path("api/passages/<uuid:id>", endpoint(GET=views.get_passage, DELETE=views.delete_passage)),
    path("api/models", endpoint(GET=views.list_models)),
    path("api/models/load", endpoint(POST=views.load)),
    path("api/models/unload", endpoint(POST=views.unload)),
    path("api/status", endpoint(GET=views.status)),
    path("api/sets", endpoint(GET=views.list_sets, POST=views.add_set)),
    path("api/sets/<uuid:id>", endpoint(GET=views.get_set, DELETE=views.delete_set)),
    path("api/sets/<uuid:id>/runs", endpoint(POST=views.begin_run)),
    path("api/sets/<uuid:id>/difference", endpoint(GET=views.difference)),
    path("api/runs/<uuid:id>", endpoint(GET=views.get_run)),
    path("api/runs/<uuid:id>/predictions", endpoint(GET=views.get_predictions)),
    path("api/runs/<uuid:id>/stop", endpoint(POST=views.stop_run)),
    path("api/runs/<uuid:id>/resume", endpoint(POST=views.resume_run)),
    path("api/feedback/export", endpoint(GET=views.export_feedback)),
    path("api/keys", endpoint(GET=views.list_keys, POST=views.add_key)),
    path("api/keys/<uuid:id>", endpoint(DELETE=views.revoke_key)),
    path("v1/models", api.endpoint(GET=api.list_models)),
    path("v1/models/<path:name>", api.endpoint(GET=api.get_model)),
    path("v1/chat/completions", api.endpoint(POST=api.chat)),
    path("v1/completions", api.endpoint(POST=api.complete)),
    path("v1/qa", api.endpoint(POST=api.answer)),
    re_path(r"^v1(?:/.*)?$", api.nowhere),
    path("readyz", api.ready),
    path("metrics", api.metrics),
]
