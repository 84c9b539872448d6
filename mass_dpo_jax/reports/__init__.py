"""What is made of runs that exist: pictures of training, tables that compare them."""
