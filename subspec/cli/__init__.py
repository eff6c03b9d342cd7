"""Command lines of ``run`` and ``predict``."""

import argparse

# From Python 3.14 on, argparse reads every help text when it is added. One of Hydra 1.3's is no string: Hydra stopped
# before it parsed anything.
if hasattr(argparse.ArgumentParser, "_check_help"):
    argparse.ArgumentParser._check_help = lambda self, action: None
