"""What people look at: structure and sizes of a model, plots, pictures, tables and report.html."""
