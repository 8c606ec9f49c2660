"""Circuits of one prompt: graphs over all attention paths, paths through single heads, and tests of what they predict.

Import from its modules: `graph`, `pruning` and `direct_effects` (all paths at once); `one_step`, `path_search`,
`path_bounds` and `path_graph` (paths one by one); `attention` and `query_key` (why a head attends); `validation`
(predicted beside measured edits) and `editing` (prune, group, edit); `layout`, `drawing`, `graph_files` and
`neuronpedia` (to look at).
"""
