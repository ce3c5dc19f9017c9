"""The program under compilation: types, graphs, meaning, encodings, page bytes. NumPy alone."""
