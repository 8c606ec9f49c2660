"""For teachers and students: checks of exercises, student copies, reports. The core modules never import it."""
