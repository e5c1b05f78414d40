-- A small shop. Everything in it is made up.
CREATE TABLE customers (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, email TEXT NOT NULL UNIQUE,
  street TEXT NOT NULL, city TEXT NOT NULL, postcode TEXT NOT NULL, credit_cents INTEGER NOT NULL
);
CREATE TABLE products (id TEXT PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE variants (
  id TEXT PRIMARY KEY, product_id TEXT NOT NULL REFERENCES products, options TEXT NOT NULL,
  price_cents INTEGER NOT NULL, stock INTEGER NOT NULL
);
CREATE TABLE orders (
  id TEXT PRIMARY KEY, customer_id TEXT NOT NULL REFERENCES customers,
  status TEXT NOT NULL CHECK (status IN ('pending', 'delivered', 'cancelled', 'return requested',
                                         'exchange requested')),
  street TEXT NOT NULL, city TEXT NOT NULL, postcode TEXT NOT NULL, note TEXT NOT NULL DEFAULT ''
);
CREATE TABLE items (
  order_id TEXT NOT NULL REFERENCES orders, variant_id TEXT NOT NULL REFERENCES variants,
  price_cents INTEGER NOT NULL, PRIMARY KEY (order_id, variant_id)
);

INSERT INTO customers VALUES
  ('C101', 'Yara Haddad', 'yara.haddad@example.com', '12 Mill Lane', 'Lausanne', '1003', 0),
  ('C102', 'Tomas Novak', 'tomas.novak@example.com', '8 Station Road', 'Brno', '60200', 2500),
  ('C103', 'Aiko Mori', 'aiko.mori@example.com', '77 Harbour View', 'Kobe', '6500001', 0),
  ('C104', 'Femi Adeyemi', 'femi.adeyemi@example.com', '3 Palm Close', 'Lagos', '101241', 900),
  ('C105', 'Ines Prado', 'ines.prado@example.com', '41 Calle Mayor', 'Toledo', '45001', 0);

INSERT INTO products VALUES
  ('P1', 'T-shirt'), ('P2', 'Desk lamp'), ('P3', 'Headphones'), ('P4', 'Backpack'),
  ('P5', 'Water bottle'), ('P6', 'Keyboard');

INSERT INTO variants VALUES
  ('V11', 'P1', 'blue, small', 1900, 12), ('V12', 'P1', 'blue, large', 1900, 0),
  ('V13', 'P1', 'black, large', 2100, 7),
  ('V21', 'P2', 'white, dimmable', 4500, 3), ('V22', 'P2', 'black, plain', 3200, 9),
  ('V31', 'P3', 'over-ear, wireless', 12900, 4), ('V32', 'P3', 'in-ear, wired', 2900, 30),
  ('V41', 'P4', 'green, 20 litres', 5900, 5), ('V42', 'P4', 'grey, 30 litres', 7900, 2),
  ('V51', 'P5', 'steel, 500 ml', 1500, 21), ('V52', 'P5', 'steel, 1000 ml', 2200, 0),
  ('V61', 'P6', 'tenkeyless, clicky', 8900, 6), ('V62', 'P6', 'full size, silent', 9900, 8);

INSERT INTO orders (id, customer_id, status, street, city, postcode) VALUES
  ('W1042', 'C101', 'pending', '12 Mill Lane', 'Lausanne', '1003'),
  ('W1043', 'C101', 'delivered', '12 Mill Lane', 'Lausanne', '1003'),
  ('W1051', 'C102', 'delivered', '8 Station Road', 'Brno', '60200'),
  ('W1060', 'C103', 'pending', '77 Harbour View', 'Kobe', '6500001'),
  ('W1061', 'C103', 'cancelled', '77 Harbour View', 'Kobe', '6500001'),
  ('W1077', 'C104', 'delivered', '3 Palm Close', 'Lagos', '101241'),
  ('W1080', 'C105', 'pending', '41 Calle Mayor', 'Toledo', '45001');

INSERT INTO items VALUES
  ('W1042', 'V21', 4500), ('W1042', 'V51', 1500),
  ('W1043', 'V11', 1900), ('W1043', 'V31', 12900),
  ('W1051', 'V62', 9900),
  ('W1060', 'V41', 5900), ('W1060', 'V32', 2900),
  ('W1061', 'V52', 2200),
  ('W1077', 'V42', 7900),
  ('W1080', 'V61', 8900), ('W1080', 'V13', 2100);
