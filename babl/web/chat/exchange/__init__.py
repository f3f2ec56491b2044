"""Conversations exported to a file and imported again: all of them as JSON, or one as Markdown for people.

A file names everything by its id, so importing it twice changes nothing.
"""
