"""For teachers and students: checks of exercises, student copies, reports.

Import from its modules: `checks` (one function per exercise), `verdict` (what a check says), `solutions` (ours, while
an exercise is open), `students` (copies without outputs of exercises, nbgrader's sources), `report` (one HTML file).
"""
