"""What a norm and the linear layers behind it become when its gain and bias move into them."""
