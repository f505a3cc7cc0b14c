-- The wrk script of every case: POST one fixed body, report one JSON line.
--
-- The body comes from the file named by BENCH_BODY, since wrk has no option for one, and
-- the headers, a line each, from BENCH_HEADERS.
-- There is no request() and no response() function on purpose: with either, wrk runs
-- Lua for each request and becomes the bottleneck before a fast server does.

local path = assert(os.getenv("BENCH_BODY"), "BENCH_BODY names no file")
local file = assert(io.open(path, "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
local headers = assert(os.getenv("BENCH_HEADERS"), "BENCH_HEADERS is not set")
for name, value in headers:gmatch("([^\n:]+): ([^\n]+)") do
  wrk.headers[name] = value
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    'BENCH {"requests":%d,"duration_us":%d,"p50_us":%d,"p99_us":%d,"max_us":%d,'
      .. '"errors":{"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}}\n',
    summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency.max,
    e.connect, e.read, e.write, e.status, e.timeout))
end
