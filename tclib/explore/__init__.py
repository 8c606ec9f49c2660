"""Looking at circuits: figures, pages, files and differences.

Any networkx graph with the attributes of `tclib.merging.merge` can be shown: node ``kind``, ``layer``, ``position``,
``token`` and ``contribution``, edge ``weight``.
"""
