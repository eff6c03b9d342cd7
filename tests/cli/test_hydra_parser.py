"""Hydra's parser on Pythons whose argparse reads help texts early."""

import argparse
import importlib

from hydra._internal.utils import get_args_parser

import subspec.cli


def test_hydras_parser_is_made_where_argparse_checks_help_texts(monkeypatch):
    add = argparse.ArgumentParser.add_argument

    def check(self, action):
        if action.help and "%" not in action.help:
            return

    def checked(self, *names, **settings):
        action = add(self, *names, **settings)
        self._check_help(action)  # as Python 3.14 does
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", checked)
    importlib.reload(subspec.cli)
    assert get_args_parser().parse_args(["a=1"]).overrides == ["a=1"]
