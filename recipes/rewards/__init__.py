"""What an answer is worth: rewards by their names, and the processes that compute them."""
