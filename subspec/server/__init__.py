"""A server that speaks the OpenAI API: one thread runs the texts, another the HTTP connections.

A request passes ``requests`` (what it may say), ``app`` (routes), ``worker`` (its text, run by the scheduler) and
``replies`` (bodies of answers and streams).
"""
