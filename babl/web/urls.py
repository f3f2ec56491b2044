"""Every address of the server; /healthz and /static/ are answered before Django (`babl.web.asgi`)."""

from itertools import chain

from babl.web.chat.views import accounts, conversations, files, health, messages, models, pages, passages, sets, v1

resources = (pages, accounts, conversations, messages, files, passages, models, sets, v1, health)
urlpatterns = list(chain.from_iterable(resource.urlpatterns for resource in resources))
