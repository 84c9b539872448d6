"""What is made of runs that exist: pages, pictures, tables and model cards."""
