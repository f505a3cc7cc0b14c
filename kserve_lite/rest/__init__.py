"""HTTP request -> dispatch -> HTTP response, without a socket."""
