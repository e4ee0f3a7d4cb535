#!/usr/bin/python3
"""The shop's catalog: reads products from PostgreSQL and asks the pricing function for prices.

GET /catalog          all products with prices
GET /catalog/<sku>    one product
GET /healthz          200 when the database answers

Settings come from the environment: DB_HOST, DB_NAME, DB_USER, DB_PASSWORD, PRICING_URL, SHOP_NAME, PORT.
"""
import json
import os
import socket
import sys
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psycopg2

ENV = os.environ


def rows(query, *args):
    connection = psycopg2.connect(
        host=ENV["DB_HOST"], dbname=ENV["DB_NAME"], user=ENV["DB_USER"], password=ENV["DB_PASSWORD"], connect_timeout=5
    )
    try:
        with connection.cursor() as cursor:
            cursor.execute(query, args)
            return cursor.fetchall()
    finally:
        connection.close()


def price(sku, cents):
    query = urllib.parse.urlencode({"sku": sku, "cents": cents, "qty": 1})
    with urllib.request.urlopen(f"{ENV['PRICING_URL']}/price?{query}", timeout=10) as answer:
        return json.load(answer)


class Catalog(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        try:
            path = self.path.split("?")[0]
            if path == "/healthz":
                rows("select 1")
                return self.answer(200, {"ok": True})
            if path == "/catalog":
                found = rows("select sku, name, cents, stock from products order by sku")
            elif path.startswith("/catalog/"):
                found = rows("select sku, name, cents, stock from products where sku = %s", path[len("/catalog/"):])
            else:
                found = []
            if not found:
                return self.answer(404, {"error": f"{path}: nothing here"})
            products = [
                {"sku": sku, "name": name, "stock": stock, "price": price(sku, cents)} for sku, name, cents, stock in found
            ]
            self.answer(200, {"shop": ENV.get("SHOP_NAME", ""), "served_by": socket.gethostname(), "products": products})
        except Exception as error:  # one request's failure is that request's answer
            print(f"{self.path}: {error}", file=sys.stderr, flush=True)
            self.answer(503, {"error": str(error)})

    def answer(self, code, body):
        text = (json.dumps(body, indent=2) + "\n").encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, form, *args):
        if self.path != "/healthz":
            print(form % args, flush=True)


ThreadingHTTPServer(("", int(ENV.get("PORT", "8000"))), Catalog).serve_forever()
