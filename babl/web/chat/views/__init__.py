"""Pages, and the JSON behind them: a module for each resource, with its routes at the end (`babl.web.urls` joins them).

No view writes to the database: `services` do, through `database.write`. Requests that change something carry the header
X-CSRFToken (pages have the token in `<meta name="csrf-token">`). Ids are UUIDs. Clients may make their own for
conversations (`id`) and must for questions (`client_id`): a request sent twice changes nothing.

Errors are `{"error": {"code", "message", "retry_after"?}}`. Status 400: invalid. 401: not logged in. 404: not found, or
another user's. 409: conflict. 413: too long. 422: the engine refuses. 429: too many requests (Retry-After). 500: the
model is broken. 503: no engine. 507: not saved.
"""
