"""Files, memory and downloads, looked at before they are trusted; nothing here knows what a transcoder is.

Import from its modules: `paths` (bundled files, files written whole), `safe_files` (hostile files), `hub`, `memory`,
`gguf_header` and `gguf_model` (llama.cpp's files).
"""
