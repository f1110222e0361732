"""WebShop: find and buy the product that an instruction describes, on a simulated shop's pages."""
