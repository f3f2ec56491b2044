"""Judging answers: official metrics, statistics, reports."""
