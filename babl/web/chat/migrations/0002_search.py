"""Full-text search of messages: FTS5 with triggers on SQLite, an index of the words on PostgreSQL.

On SQLite, a later migration that alters `chat_message` makes the table anew and so drops its triggers; it must run
`FORWARD` again. Rows of the index have numbers of their own: those of a table with another key may change in a VACUUM.
"""

from django.db import migrations

SQLITE_FORWARD = """
CREATE TABLE chat_search_row (row INTEGER PRIMARY KEY, message_id TEXT NOT NULL UNIQUE);
CREATE VIRTUAL TABLE chat_search USING fts5(content, tokenize = "unicode61 remove_diacritics 2");
CREATE TRIGGER chat_search_insert AFTER INSERT ON chat_message BEGIN
  INSERT INTO chat_search_row (message_id) VALUES (new.id);
  INSERT INTO chat_search (rowid, content) SELECT row, new.content FROM chat_search_row WHERE message_id = new.id;
END;
CREATE TRIGGER chat_search_update AFTER UPDATE OF content ON chat_message BEGIN
  UPDATE chat_search SET content = new.content
    WHERE rowid = (SELECT row FROM chat_search_row WHERE message_id = new.id);
END;
CREATE TRIGGER chat_search_delete AFTER DELETE ON chat_message BEGIN
  DELETE FROM chat_search WHERE rowid = (SELECT row FROM chat_search_row WHERE message_id = old.id);
  DELETE FROM chat_search_row WHERE message_id = old.id;
END;
"""
SQLITE_BACKWARD = """
DROP TRIGGER chat_search_insert;
DROP TRIGGER chat_search_update;
DROP TRIGGER chat_search_delete;
DROP TABLE chat_search;
DROP TABLE chat_search_row;
"""
# The very expression that django.contrib.postgres.search.SearchVector writes, or the index is not used.
POSTGRESQL_FORWARD = """
CREATE INDEX chat_search ON chat_message USING gin (to_tsvector('simple'::regconfig, COALESCE(content, '')))
"""
POSTGRESQL_BACKWARD = "DROP INDEX chat_search"


def forward(apps, schema_editor):
    if schema_editor.connection.vendor == "sqlite":
        schema_editor.connection.connection.executescript(SQLITE_FORWARD)
    else:
        schema_editor.execute(POSTGRESQL_FORWARD)


def backward(apps, schema_editor):
    if schema_editor.connection.vendor == "sqlite":
        schema_editor.connection.connection.executescript(SQLITE_BACKWARD)
    else:
        schema_editor.execute(POSTGRESQL_BACKWARD)


class Migration(migrations.Migration):
    """Words of messages can be searched."""

    atomic = False  # SQLite's executescript commits by itself
    dependencies = [("chat", "0001_first")]
    operations = [migrations.RunPython(forward, backward)]
