"""Programs that are part of the package: what ``egohod NAME`` and, in a checkout, ``python main_NAME.py`` run."""
