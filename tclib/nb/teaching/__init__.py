"""For teachers and students: checks of exercises, student copies, reports.

Import from its modules: `checks` (one function per exercise), `verdict` (what a check says), `students` (copies without
solutions), `report` (one HTML file).
"""
