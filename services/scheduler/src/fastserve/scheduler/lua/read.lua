-- Several jobs in one call. Keys: see write.lua.
--
-- KEYS  1 epoch
-- ARGV  1 count of fields; their names; then ids of jobs
--
-- Returns for each job the values of the fields, then its log; nothing (false) for what is not there.

local base = string.sub(KEYS[1], 1, -6)
local count = tonumber(ARGV[1])
local jobs = {}
for at = count + 2, #ARGV do
  local values = redis.call('HMGET', base .. 'job:' .. ARGV[at], unpack(ARGV, 2, count + 1))
  values[count + 1] = redis.call('GET', base .. 'log:' .. ARGV[at])
  jobs[#jobs + 1] = values
end
return jobs
