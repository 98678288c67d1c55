"""The page of ``egohod serve``: search, watch and mark moments of one's own videos."""
